"""What the package must reach, measured: this package and its peers in one run, outputs checked first."""
