"""In a clone: `python -m tools.token_dynamics` is `rho1 dynamics`."""

from rho1_jax.token_dynamics import main

if __name__ == "__main__":
    main()
