"""Small files in the formats of released versions, which every later version must read."""
