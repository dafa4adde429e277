"""`python -m ochat`: the `ochat` command of this Python."""

from ochat.cli import main

if __name__ == "__main__":
    main()
