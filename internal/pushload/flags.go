package pushload

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/push-manager/push-manager/internal/apiclient"
	"github.com/push-manager/push-manager/internal/config"
	"github.com/push-manager/push-manager/internal/load"
)

// flags are the command line.
type flags struct {
	Address []string `default:"localhost:50053" env:"PUSH_MANAGER_ADDRESS" help:"HOST:PORT of one or several Push-Managers, comma-separated, or any gRPC targets."`
	apiclient.Flags

	Way         string `default:"unary" enum:"unary,stream" help:"unary: a call for each push; stream: one PushStream on each connection."`
	Connections int    `default:"2" help:"Connections in all, at least one for each address."`

	Rate     float64       `default:"1000" help:"Pushes a second, sent when they are due whatever the answers do. 0: as fast as --in-flight allows."`
	Arrival  string        `default:"even" enum:"even,poisson" help:"Distances between pushes: even, or poisson like many independent callers."`
	InFlight int           `default:"0" help:"Most pushes under way. 0: 256 a connection, 1024 with --way=stream."`
	Duration time.Duration `default:"30s" help:"How long to measure."`
	Warmup   time.Duration `default:"3s" help:"How long to push before that."`
	Timeout  time.Duration `default:"5s" help:"Longest wait for an answer."`

	Mix          mix    `default:"user=80,room=19,broadcast=1" placeholder:"KIND=WEIGHT,..." help:"Weights of user, room, users and broadcast pushes (default: ${default})."`
	Users        int    `default:"1000" help:"Number of users to choose from."`
	Rooms        int    `default:"100" help:"Number of rooms to choose from."`
	UserPattern  string `default:"u%d" help:"The users' ids, numbered from 0: u%d or user-%06d."`
	RoomPattern  string `default:"r%d" help:"The rooms' ids."`
	UsersPerPush int    `default:"10" help:"Users of a users push."`
	Payload      string `default:"128" placeholder:"BYTES" help:"Size of the message, like 128 or 4KiB (default: ${default})."`
	PayloadFile  string `placeholder:"FILE" help:"Push the content of a file instead."`
	Seed         uint64 `default:"1" help:"The same seed gives the same pushes."`

	MessageIDs bool     `name:"message-ids" help:"Give every push a message id."`
	Repeat     float64  `default:"0" help:"Share of pushes that are sent twice, with the same message id."`
	ClientAck  bool     `help:"Ask for acknowledgements by clients: ACK_CLIENT."`
	Clients    int      `default:"0" help:"WebSocket clients to be, which acknowledge: the first of --users, each in one of --rooms."`
	ClientURL  []string `name:"client-url" default:"ws://localhost:8080/ws" env:"CONNECT_NODE_URL" help:"WebSockets of one or several Connect-Nodes for them, comma-separated."`

	MaxErrors float64 `default:"0.01" help:"Largest share of pushes that may go wrong for exit code 0."`
	JSON      string  `name:"json" placeholder:"FILE" help:"Write the results as JSON, - for standard output."`
	Quiet     bool    `short:"q" help:"Print only what went wrong."`
}

// config is the run that the flags ask for. done is to be called after it.
func (f *flags) config() (_ load.Config, done func(), err error) {
	if err := f.check(); err != nil {
		return load.Config{}, nil, err
	}
	payload, err := f.payload()
	if err != nil {
		return load.Config{}, nil, err
	}
	options, done, err := f.Dial(f.Address...)
	if err != nil {
		return load.Config{}, nil, &usageError{err.Error()}
	}
	cfg := load.Config{
		Addresses: f.Address, Connections: f.Connections,
		DialOptions: options,
		Rate:        f.Rate, Poisson: f.Arrival == "poisson", InFlight: f.InFlight,
		Duration: f.Duration, Warmup: f.Warmup, Timeout: f.Timeout,
		Mix: load.Mix(f.Mix), Users: f.Users, Rooms: f.Rooms, UsersPerPush: f.UsersPerPush,
		UserPattern: f.UserPattern, RoomPattern: f.RoomPattern, Payload: payload, Seed: f.Seed,
		IDs: f.MessageIDs, Repeat: f.Repeat, ClientAck: f.ClientAck, Clients: f.Clients, ClientURLs: f.ClientURL,
	}
	if f.Way == "stream" {
		cfg.Way = load.Stream
	}
	if err := cfg.Validate(); err != nil {
		done()
		return cfg, nil, &usageError{err.Error()}
	}
	return cfg, done, nil
}

// check reports everything that is wrong with the flags, by their names.
func (f *flags) check() error {
	var errs []error
	wrong := func(bad bool, flag, format string, args ...any) {
		if bad {
			errs = append(errs, fmt.Errorf("--%s: %s", flag, fmt.Sprintf(format, args...)))
		}
	}
	number := func(flag string, n, low, high int) {
		wrong(n < low || n > high, flag, "%d must be from %d to %d", n, low, high)
	}
	length := func(flag string, d, low, high time.Duration) {
		wrong(d < low || d > high, flag, "%v must be from %v to %v", d, low, high)
	}
	for _, address := range f.Address {
		wrong(strings.TrimSpace(address) == "", "address", "an empty one")
	}
	wrong(!(f.Rate >= 0 && f.Rate <= load.MaxRate), "rate", "%v must be from 0 to %.0f", f.Rate, load.MaxRate)
	wrong(!(f.MaxErrors >= 0 && f.MaxErrors <= 1), "max-errors", "%v must be from 0 to 1", f.MaxErrors)
	wrong(!(f.Repeat >= 0 && f.Repeat <= 1), "repeat", "%v must be from 0 to 1", f.Repeat)
	number("clients", f.Clients, 0, min(f.Users, load.MaxClients))
	for _, address := range f.ClientURL {
		u, err := url.Parse(address)
		wrong(err != nil || u.Scheme != "ws" && u.Scheme != "wss" || u.Host == "", "client-url", "%q is not like ws://HOST:PORT/ws", address)
	}
	number("connections", f.Connections, 1, load.MaxConnections)
	number("in-flight", f.InFlight, 0, load.MaxInFlight)
	number("users", f.Users, 1, load.MaxKeys)
	number("rooms", f.Rooms, 1, load.MaxKeys)
	number("users-per-push", f.UsersPerPush, 1, 10_000)
	length("duration", f.Duration, 100*time.Millisecond, load.MaxDuration)
	length("warmup", f.Warmup, 0, load.MaxDuration)
	length("timeout", f.Timeout, time.Millisecond, load.MaxTimeout)
	for flag, text := range map[string]string{"user-pattern": f.UserPattern, "room-pattern": f.RoomPattern} {
		if err := load.CheckPattern(text); err != nil {
			wrong(true, flag, "%v", err)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return &usageError{strings.ReplaceAll(err.Error(), "\n", "; ")}
	}
	return nil
}

// mix reads load.Mix from KIND=WEIGHT,...
type mix load.Mix

// UnmarshalText replaces the whole mix.
func (m *mix) UnmarshalText(text []byte) error {
	*m = mix{}
	sum := 0.0
	for part := range strings.SplitSeq(string(text), ",") {
		name, number, _ := strings.Cut(strings.TrimSpace(part), "=")
		at := slices.IndexFunc(load.Kinds(), func(k load.Kind) bool { return k.String() == name })
		if at < 0 {
			return fmt.Errorf("%q is none of user, room, users and broadcast", name)
		}
		weight, err := strconv.ParseFloat(number, 64)
		if err != nil || !(weight >= 0 && weight <= 1e9) {
			return fmt.Errorf("%q is no weight for %s", number, name)
		}
		m[load.Kinds()[at]] = weight
		sum += weight
	}
	if sum == 0 {
		return errors.New("nothing to push")
	}
	return nil
}

// payload is what is pushed: a file, or letters that no compression makes nothing of.
func (f *flags) payload() ([]byte, error) {
	if f.PayloadFile != "" {
		return readPayload(f.PayloadFile)
	}
	size, err := config.ParseBytes(f.Payload)
	switch {
	case err != nil:
		return nil, &usageError{"--payload: " + err.Error()}
	case size < 0 || size > load.MaxPayload:
		return nil, &usageError{fmt.Sprintf("--payload: %s must be from 0 to %s", f.Payload, config.FormatBytes(load.MaxPayload))}
	}
	const letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 ."
	random := rand.New(rand.NewPCG(f.Seed, 0))
	data := make([]byte, size)
	for i := range data {
		data[i] = letters[random.IntN(len(letters))]
	}
	return data, nil
}

func readPayload(name string) (data []byte, err error) {
	file, err := os.Open(name)
	if err != nil {
		return nil, &usageError{"--payload-file: " + err.Error()}
	}
	defer func() { _ = file.Close() }()
	data, err = io.ReadAll(io.LimitReader(file, load.MaxPayload+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("read the payload: %w", err)
	case len(data) > load.MaxPayload:
		return nil, &usageError{fmt.Sprintf("--payload-file: %s has more than %s", name, config.FormatBytes(load.MaxPayload))}
	}
	return data, nil
}

// file is where results go as JSON. It is made before the run, so that a wrong name costs
// no hour of measuring, beside its name, so that a failed run leaves the last results alone.
type file struct {
	*os.File

	name string
}

func (f *flags) create() (*file, error) {
	if f.JSON == "" || f.JSON == "-" {
		return nil, nil //nolint:nilnil // there is none
	}
	temporary, err := os.CreateTemp(filepath.Dir(f.JSON), "."+filepath.Base(f.JSON)+".*")
	if err != nil {
		return nil, fmt.Errorf("--json: %w", err)
	}
	return &file{temporary, f.JSON}, nil
}

func (f *file) save(rep *report) error {
	w := bufio.NewWriter(f)
	const readable = 0o644
	if err := errors.Join(rep.json(w), w.Flush(), f.Chmod(readable), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), f.name)
}

// abandon removes what was not saved.
func (f *file) abandon() {
	if f != nil {
		_ = f.Close()
		_ = os.Remove(f.Name())
	}
}
