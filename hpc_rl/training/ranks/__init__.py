"""The processes of one training: how they find each other, what they have in common, how they leave."""
