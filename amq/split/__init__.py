"""Split fine-tuning: two parties train one model's LoRA, and send activations and gradients in few bits (AMAQ).

The client holds the text and the first blocks, the server the others. Per micro-batch the client sends the hidden
states at the cut and gets their gradients back, both quantized channel by channel (arXiv 2510.05468). docs/split.md
says how it is used and what goes over the wire.

    settings, terms     what each command takes; what both parties must agree on
    wire, coder, link   frames; the entropy coder; a connection with limits, deadlines and counters
    quantizer, policy   a tensor as codes; how many bits each channel gets
    stream              one direction at one cut: policy, quantizer and coder together
    model, data         one party's blocks with their LoRA; the order of samples
    party, client, server, state   the two loops, and what they keep on disk
    records, evaluate, report      what a run leaves, and what is made of it
"""
