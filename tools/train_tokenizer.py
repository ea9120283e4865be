"""In a clone: `python -m tools.train_tokenizer` is `rho1 tokenizer`."""

from rho1_jax.train_tokenizer import main

if __name__ == "__main__":
    main()
