// Biz-server pushes a text to a room. What is safe to push again is pushed again by package client:
//
//	go run ./examples/biz-server lobby "Hello"
package main

import (
	"cmp"
	"context"
	"fmt"
	"log"
	"os"

	"github.com/push-manager/push-manager/client"
)

func main() {
	if len(os.Args) != 3 {
		log.Fatal("usage: biz-server ROOM TEXT")
	}
	c, err := client.New(cmp.Or(os.Getenv("PUSH_MANAGER_ADDRESS"), "localhost:50053"))
	if err != nil {
		log.Fatal(err)
	}
	r, err := c.PushToRoom(context.Background(), os.Args[1], client.Text(os.Args[2]))
	if err != nil {
		log.Fatal(err) // It says whether the push may have been delivered.
	}
	// Each target is in one of four counts. Partial results are results.
	fmt.Println(r.Message, "delivered", r.Delivered, "offline", r.Offline, "failed", r.Failed, "unknown", r.Unknown)
}
