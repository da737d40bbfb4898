package program

// ConnectNodeCommand is the reference Connect-Node as a command.
func ConnectNodeCommand() Command {
	return Command{Name: "connect-node", Help: "Run the reference Connect-Node.", New: func() Settings { return &ConnectNodeConfig{} }}
}

// ControllerCommand is the reference Controller as a command.
func ControllerCommand() Command {
	return Command{Name: "controller", Help: "Run the reference Controller.", New: func() Settings { return &ControllerConfig{} }}
}
