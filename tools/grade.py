"""In a clone: `python -m tools.grade` is `rho1 grade`."""

from rho1_jax.grade import main

if __name__ == "__main__":
    main()
