int duplex_placeholder;
