"""`python -m jaxserve` is the command `jaxserve`."""

from jaxserve.cli import command

if __name__ == "__main__":
    command()
