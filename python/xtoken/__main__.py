"""`python -m xtoken`: the command, by the interpreter that is asked for."""

from xtoken.cli import main

if __name__ == "__main__":
    main()
