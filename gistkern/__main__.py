"""``python -m gistkern`` is the console command ``gistkern``."""

from gistkern.cli.main import main

if __name__ == "__main__":
    main()
