"The checks of input: one voice, plain values, nothing accepted by accident"
