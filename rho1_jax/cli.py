"""The command `rho1`: one subcommand for each module of this package with a `main`. Nothing heavy is imported here."""

import difflib
import importlib
import sys

import rho1_jax

# Subcommand -> its module in rho1_jax, and the line that `rho1 --help` shows.
COMMANDS = {
    "train": ("train", "train a model: reference, CLM, random or SLM"),
    "prepare": ("prepare", "tokenize and pack text files into a data set"),
    "score": ("score", "store a reference's losses of a data set, for any number of runs"),
    "evaluate": ("evaluate", "measure a model's held-out loss and its accuracy on math tasks"),
    "generate": ("generate", "continue prompts with a model, or chat with it"),
    "tokenizer": ("train_tokenizer", "train a SentencePiece tokenizer on text files"),
    "import": ("import_hf", "turn a Hugging Face folder into a checkpoint, or compare it with Transformers"),
    "export": ("export_hf", "turn a checkpoint into a Hugging Face folder"),
    "grade": ("grade", "grade generations that another program wrote"),
    "inspect": ("inspect_path", "show what a run, a checkpoint, a model folder, a data set or scores hold"),
    "verify": ("verify", "check runs, data sets and stored scores against their checksums"),
    "dynamics": ("token_dynamics", "classify tokens by how their loss changes during a run"),
    "report": ("report", "show which tokens SLM selects, as an HTML page"),
}


def main() -> None:
    """Runs `rho1 COMMAND [--flag=value ...]`."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h", "help"):
        print("usage: rho1 COMMAND [--flag=value ...]\n")
        print("\n".join(f"  {command:<11}{line}" for command, (_, line) in COMMANDS.items()))
        print("\n`rho1 COMMAND --help` lists the flags of a command.")
    elif name == "--version":
        print(rho1_jax.__version__)
    elif name in COMMANDS:
        sys.argv = [f"rho1 {name}", *arguments]
        try:
            importlib.import_module(f"rho1_jax.{COMMANDS[name][0]}").main()
        except KeyboardInterrupt:  # while the imports run; `runtime.command_line` handles it later
            print("interrupted", file=sys.stderr)
            sys.exit(130)
    else:
        (nearest,) = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0)
        print(f"error: rho1 {name}: no such command. The nearest is `rho1 {nearest}`", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
