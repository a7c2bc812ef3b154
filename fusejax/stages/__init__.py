"""The stages of a run, one short file per command: what is read, what is called, what is written."""
