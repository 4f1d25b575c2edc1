"""What several tests share: tiny models, data, references, and programs that tests start."""
