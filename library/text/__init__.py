"""From captions to token ids and on to encoder outputs: tokenizers, chunks of 75 tokens, prompt weights."""
