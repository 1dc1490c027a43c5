"""Models larger than their memory, measured beside llama.cpp under the same limit."""
