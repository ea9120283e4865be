"""`rho1 X` in a clone: `python -m tools.token_dynamics`."""

from rho1_jax.token_dynamics import main

if __name__ == "__main__":
    main()
