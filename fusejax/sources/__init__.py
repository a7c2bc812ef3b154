"""Source LLMs: running them over a corpus and keeping their top-k next-token distributions."""
