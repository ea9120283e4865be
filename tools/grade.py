"""`rho1 X` in a clone: `python -m tools.grade`."""

from rho1_jax.grade import main

if __name__ == "__main__":
    main()
