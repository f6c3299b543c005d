"""What commands say of gates. Importing the gates themselves takes seconds, which `--help` need not."""

DEFAULT = "cross:128+calibration"
# which gate? the default, the one that little text is enough for, and the paper's
CANDIDATES = (DEFAULT, "linear+calibration", "mlp:512")
HELP = "Kind of gate, the width of its hidden layer if it has one, and whether it predicts temperatures, too: mlp, "
HELP += "linear+calibration, cross:128+calibration."
