"""`python -m blip2fast`: the command `blip2fast`."""

from blip2fast.command_line import main

if __name__ == "__main__":
    main()
