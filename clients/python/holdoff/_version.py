"""The version of this distribution, which the build reads from here."""

VERSION = "0.1.0"
