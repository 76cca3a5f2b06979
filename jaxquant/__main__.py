"""`python -m jaxquant`: the same as the command `jaxquant`."""

from jaxquant.cli import main

if __name__ == "__main__":
    main()
