"""What `ai-service serve` is built from, beside `ai_service.py`."""
