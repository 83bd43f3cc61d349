"""Offline batch jobs: JSONL of OpenAI batch lines in, answers in the same order out, resumable after any death."""
