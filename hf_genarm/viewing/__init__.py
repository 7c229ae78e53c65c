"""Pictures of tokens: pure drawing of text and numbers, for notebooks, terminals and papers."""
