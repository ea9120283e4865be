"""In a clone: `python -m tools.export_hf` is `rho1 export`."""

from rho1_jax.export_hf import main

if __name__ == "__main__":
    main()
