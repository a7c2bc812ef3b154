"""Tests of the repository as a whole: layers, sizes, public names, packaging, documents."""
