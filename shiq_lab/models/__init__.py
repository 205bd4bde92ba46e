"""Models with one interface: (input_ids, attention_mask) -> .logits. One file each."""
