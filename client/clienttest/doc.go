// Package clienttest has a Push-Manager for tests of programs that push: a real gRPC server in memory that answers what the test says.
//
//	server := clienttest.NewServer(t)
//	server.Reply(clienttest.Refused(codes.ResourceExhausted, "OVERLOADED", 10*time.Millisecond), clienttest.Delivered())
//	notify(server.Client())                    // the code under test
//	if n := len(server.Pushes()); n != 2 { ... }
//
// It checks no limits and delivers nothing to anybody.
package clienttest
