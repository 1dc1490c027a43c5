"""llama.cpp, OpenVINO and this compiler side by side: the same model shapes, one run, each in a process of its own."""
