"""The only room that knows PEFT: targets, attach, the view of one adapted layer, checkpoint files."""
