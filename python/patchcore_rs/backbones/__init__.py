"""Frozen networks that turn images into feature maps. The only room that uses torchvision and timm."""
