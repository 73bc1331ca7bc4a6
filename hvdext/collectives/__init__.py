"""What users exchange: tensors, objects, variables, and how their gradients flow."""
