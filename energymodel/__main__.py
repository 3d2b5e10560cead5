"""`python -m energymodel`."""

from energymodel.cli import main

main()
