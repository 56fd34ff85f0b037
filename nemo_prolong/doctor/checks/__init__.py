"""From facts to findings. Functions here read nothing; ``stage`` alone opens files, each on a probe of its own."""
