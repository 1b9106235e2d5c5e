"""`python -m blip2fast.demo`."""

from blip2fast._imports import needs

with needs("run the demo", "matplotlib", "rich", "sklearn"):
    from blip2fast.demo.run import main

if __name__ == "__main__":
    raise SystemExit(main())
