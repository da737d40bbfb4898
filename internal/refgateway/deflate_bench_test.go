//go:build unix

package refgateway

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/klauspost/compress/flate"

	"github.com/push-manager/push-manager/transport/node"
)

// sample is the JSON of a chat message of about so many bytes. No two have the same words.
func sample(r *rand.Rand, size int) []byte {
	words := strings.Fields("the of and to a in is it you that he was for on are with as his they be at one have this from or had by hot but some what there we can out other were all your when up use word how said an each she which do their time if will way about many then them would write like so these her long make thing see him two has look more day could go come did my sound no most number who over know water than call first people may down side been now find")
	var text strings.Builder
	for text.Len() < size-110 {
		text.WriteString(words[r.IntN(len(words))] + " ")
	}
	b, _ := json.Marshal(map[string]any{
		"id": fmt.Sprintf("%016x", r.Uint64()), "from": fmt.Sprint("user-", r.IntN(100_000)), "at": 1_764_000_000_000 + r.IntN(1e9), "text": text.String(), "kind": "chat",
	})
	return b
}

// BenchmarkDeflateLevels compresses what the recipients of a push share: how small it becomes, at which level. kept=true is with a
// compressor of its own for each client, which knows the messages before: each client costs as much as one with kept=false costs all.
func BenchmarkDeflateLevels(b *testing.B) {
	for _, size := range []int{200, 2 << 10, 16 << 10} {
		r := rand.New(rand.NewPCG(1, 2))
		var tails [][]byte
		for range 200 {
			f := newPush(&node.Message{Data: sample(r, size), Timestamp: 1_764_000_000}, "room", false)
			tails = append(tails, f.tail[:len(f.tail)-1])
		}
		for _, kept := range []bool{false, true} {
			for _, level := range []int{1, 3, 5, 6, 7, 9} {
				b.Run(fmt.Sprintf("bytes=%d/kept=%v/level=%d", size, kept, level), func(b *testing.B) {
					var out bytes.Buffer
					w, _ := flate.NewWriter(&out, level)
					before, after, cpu := 0, 0, cpuTime()
					for i := 0; b.Loop(); i++ {
						out.Reset()
						if !kept {
							w.Reset(&out)
						}
						_, _ = w.Write(tails[i%len(tails)])
						_ = w.Flush()
						before, after = before+len(tails[i%len(tails)]), after+out.Len()
					}
					b.ReportMetric(100*float64(after)/float64(before), "%size")
					b.ReportMetric(float64(cpuTime()-cpu)/float64(b.N), "cpu-ns/op")
				})
			}
		}
	}
}

// BenchmarkDeflate pushes to a room of 500 clients in another process: CPU of the gateway for each delivery, bytes on the wire, memory
// for each client, and for the compressor of each core.
func BenchmarkDeflate(b *testing.B) {
	const clients = 500
	for _, size := range []int{200, 2 << 10} {
		for _, how := range []string{"off", "plain", "deflate"} { // plain: on, and the client does not offer it
			b.Run(fmt.Sprintf("bytes=%d/%s", size, how), func(b *testing.B) {
				g, _ := start(b, newController(b), func(c *Config) { c.Deflate, c.DeflateMinBytes = how != "off", 64 })
				without := inUse()
				if g.deflater != nil {
					for range g.cores { // each of them takes the next compressor
						g.deflater.deflate(sample(rand.New(rand.NewPCG(1, 2)), size))
					}
				}
				before := inUse()
				users := dialElsewhere(b, g, clients, how == "deflate")
				r := rand.New(rand.NewPCG(1, 2))
				push := func() {
					m := &node.Message{RoomID: "room", Data: sample(r, size), Timestamp: 1_764_000_000}
					for _, user := range users {
						sessions{g.users}.Deliver(user, m)
					}
					for g.writers.Load() > 0 {
						time.Sleep(50 * time.Microsecond)
					}
				}
				for range 20 {
					push()
				}
				after := inUse()
				sent, cpu := g.count.bytesSent.Get(), cpuTime()
				for b.Loop() {
					push()
				}
				deliveries := float64(b.N * clients)
				b.ReportMetric(float64(cpuTime()-cpu)/deliveries, "cpu-ns/delivery")
				b.ReportMetric(float64(g.count.bytesSent.Get()-sent)/deliveries, "wire-B/delivery")
				b.ReportMetric(float64(after.heap+after.stacks-before.heap-before.stacks)/clients, "B/client")
				b.ReportMetric(float64(before.heap-without.heap)/float64(g.cores), "B/core")
				b.ReportMetric(0, "ns/op") // it is mostly that of the clients
			})
		}
	}
}

// cpuTime is what this process has used.
func cpuTime() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u) // it cannot fail
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// clientsEnv makes this program the clients of another one, see beClients.
const clientsEnv = "REFGATEWAY_CLIENTS"

// dialElsewhere has another process connect clients, and read what comes until the benchmark ends.
func dialElsewhere(b *testing.B, g *Gateway, clients int, deflate bool) (users []string) {
	b.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%s %d %v", clientsEnv, g.HTTPAddr(), clients, deflate))
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		_ = in.Close() // tells it to end
		_ = cmd.Wait()
	})
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
		b.Fatalf("the clients say %q, %v", line, err)
	}
	for i := range clients {
		users = append(users, fmt.Sprintf("user-%07d", i))
	}
	return users
}

// beClients connects, says so, and reads until its input ends.
func beClients(what string) error {
	var addr string
	var clients int
	var deflate bool
	if _, err := fmt.Sscan(what, &addr, &clients, &deflate); err != nil {
		return err
	}
	extensions := ""
	if deflate {
		extensions = "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n"
	}
	var reading sync.WaitGroup
	for i := range clients {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			return err
		}
		defer c.Close()
		fmt.Fprintf(c, "GET /ws?room_id=room&user_id=user-%07d HTTP/1.1\r\nHost: gateway\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"+
			"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n%s\r\n", i, extensions)
		var got []byte
		for b := make([]byte, 1024); !bytes.Contains(got, []byte(`"joined"`)); {
			n, err := c.Read(b)
			if err != nil {
				return err
			}
			got = append(got, b[:n]...)
		}
		if deflate != bytes.Contains(got, []byte("permessage-deflate")) {
			return fmt.Errorf("compression is not as wanted: %q", got)
		}
		reading.Go(func() { _, _ = io.Copy(io.Discard, c) })
	}
	if _, err := io.WriteString(os.Stdout, "ready\n"); err != nil {
		return err
	}
	_, _ = io.Copy(io.Discard, os.Stdin)
	return nil
}
