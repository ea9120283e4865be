"""In a clone: `python -m tools.prepare_data` is `rho1 prepare`."""

from rho1_jax.prepare import main

if __name__ == "__main__":
    main()
