"""`python -m ci_platform` is `dynflow`."""

from ci_platform.cli import main

if __name__ == "__main__":
    main()
