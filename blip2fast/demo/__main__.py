"""`python -m blip2fast.demo`."""

from blip2fast.demo.run import main

if __name__ == "__main__":
    raise SystemExit(main())
