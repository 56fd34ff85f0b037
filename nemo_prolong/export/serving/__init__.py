"""What a server needs beside an exported directory: settings sized for a GPU, start script, check and FP8 weights."""
