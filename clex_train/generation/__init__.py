"""Text from a prompt: the t that each length is read at, the streamed answer, and its speed."""
