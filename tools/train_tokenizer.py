"""`rho1 X` in a clone: `python -m tools.train_tokenizer`."""

from rho1_jax.train_tokenizer import main

if __name__ == "__main__":
    main()
