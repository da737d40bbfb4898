package program

// Serve is Push-Manager as a command.
func Serve() Command {
	return Command{Name: "serve", Help: "Serve the push API. Needs no name.", File: true, New: func() Settings { return &PushManagerConfig{} }}
}

// All are the commands of push-manager.
func All() []Command {
	return []Command{Serve()}
}
