"""A trained run as a Hugging Face directory, compared with its source tensor by tensor and logit by logit."""
