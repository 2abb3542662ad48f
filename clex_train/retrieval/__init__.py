"""Retrieval prompts with known answers: passkey, needles, RULER's tasks, and the haystacks around them."""
