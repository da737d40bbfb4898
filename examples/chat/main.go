// Chat is a chat for browsers: a page, and a server that pushes what is said. docs/tutorial.md walks through it.
//
//	go run ./examples/chat
package main

import (
	"cmp"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"net/http"
	"os"
	"time"

	"github.com/push-manager/push-manager/client"
	"github.com/push-manager/push-manager/sdk/browser"
)

//go:embed page.html
var page []byte

// said is what a page sends: a text for a room or for a user.
type said struct {
	From, Room, User, Text string
}

func main() {
	address := cmp.Or(os.Getenv("CHAT_ADDRESS"), "localhost:8000")
	gateway := cmp.Or(os.Getenv("CONNECT_NODE_URL"), "ws://localhost:8080/ws")
	pushes, err := client.New(cmp.Or(os.Getenv("PUSH_MANAGER_ADDRESS"), "localhost:50053"))
	if err != nil {
		log.Fatal(err)
	}
	server := &http.Server{Addr: address, Handler: handler(pushes, gateway), ReadTimeout: 10 * time.Second}
	fmt.Println("open http://" + address)
	log.Fatal(server.ListenAndServe())
}

func handler(pushes *client.Client, gateway string) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(page) })
	mux.HandleFunc("GET /push-client.js", browser.Serve)
	mux.HandleFunc("GET /gateway", func(w http.ResponseWriter, _ *http.Request) { _ = json.NewEncoder(w).Encode(gateway) })
	mux.HandleFunc("POST /say", func(w http.ResponseWriter, r *http.Request) {
		var s said
		if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 64<<10)).Decode(&s); err != nil || s.Text == "" || (s.Room == "") == (s.User == "") {
			http.Error(w, "give a text, and a room or a user", http.StatusBadRequest)
			return
		}
		to := client.Room(s.Room)
		if s.User != "" {
			to = client.User(s.User)
		}
		// Whoever is away gets it when they come back: from the log of the room, or from what is stored for the user.
		message := client.Message{Data: []byte(s.Text), Metadata: map[string]string{"from": s.From}}
		result, err := pushes.Push(r.Context(), to, message, client.StoreIfOffline())
		if err != nil {
			code := http.StatusServiceUnavailable
			if errors.Is(err, client.ErrUnknown) {
				code = http.StatusGatewayTimeout // it may have arrived
			}
			http.Error(w, err.Error(), code)
			return
		}
		_ = json.NewEncoder(w).Encode(map[string]any{"outcome": result.Outcome().String(), "delivered": result.Delivered, "stored": result.Stored})
	})
	return mux
}
