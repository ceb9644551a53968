"""Students: new ones, pretrained ones, and ones with another tokenizer."""
