"""`python -m llama3_sae` is the console script `llama3-sae`."""

from llama3_sae.commands import main

if __name__ == "__main__":
    main()
