package load

import (
	"errors"
	"fmt"
	"math"
	"time"

	"google.golang.org/grpc"
)

// Kind is what a push is sent to.
type Kind uint8

// The kinds of pushes.
const (
	ToUser Kind = iota
	ToRoom
	ToUsers
	ToAll
	kinds
)

// Kinds lists all kinds in the order of reports.
func Kinds() []Kind { return []Kind{ToUser, ToRoom, ToUsers, ToAll} }

// String is the name of a kind in flags and reports.
func (k Kind) String() string {
	switch k {
	case ToUser:
		return "user"
	case ToRoom:
		return "room"
	case ToUsers:
		return "users"
	case ToAll:
		return "broadcast"
	default:
		return "unknown"
	}
}

// Mix has a weight for each Kind. Only their ratios count.
type Mix [kinds]float64

// Way is how pushes travel.
type Way uint8

// The ways.
const (
	Unary  Way = iota // a call for each push
	Stream            // one PushStream on each connection
)

// String is the name of a way in flags and reports.
func (w Way) String() string {
	if w == Stream {
		return "stream"
	}
	return "unary"
}

// Progress is how far a run is, and the time since the last Progress in figures.
type Progress struct {
	Elapsed  time.Duration // since the first push was due, the warm-up included
	Warmup   bool
	Draining bool    // nothing more is sent
	Rate     float64 // answers a second
	InFlight int
	Errors   int64 // since the start: refused, failed and unknown
	P50, P99 time.Duration
	Pushes   int64 // the percentiles are of so many
}

// Config of a run. Zero fields mean the defaults; Addresses, Rate or InFlight, and a
// Mix are required.
type Config struct {
	Addresses   []string          // gRPC targets; each gets an equal share
	DialOptions []grpc.DialOption // credentials, for example
	Connections int               // in all, at least one for each address
	Way         Way

	Rate     float64 // pushes a second; 0: closed loop
	Poisson  bool    // due at random moments, as from many independent callers; else at even distances
	InFlight int     // most pushes under way
	Duration time.Duration
	Warmup   time.Duration // before Duration; sent, not measured
	Timeout  time.Duration // of a push, from its sending

	Mix          Mix
	Users        int // to be chosen from
	UsersPerPush int // of kind ToUsers
	Rooms        int
	UserPattern  string // the n-th user's id, like "u%d"
	RoomPattern  string
	Payload      []byte
	Seed         uint64

	// IDs gives every push a message id that no other run has. Repeat is the share of pushes that are
	// sent twice, one after the other, with the same id: for those who had the first the second is a
	// duplicate.
	IDs    bool
	Repeat float64
	// ClientAck asks for acknowledgements by clients (ACK_CLIENT).
	ClientAck bool

	// Clients is the number of WebSocket clients that the generator itself is, at ClientURLs in turn:
	// the first of Users, each in a room. They acknowledge, and look for messages that come twice.
	// They are there before the first push, and stay until the last is answered.
	Clients    int
	ClientURLs []string

	// OnProgress is called about twice a second, from one goroutine. nil: never.
	OnProgress func(Progress)

	// nap sleeps precisely; tests in virtual time have their own.
	nap func(time.Duration)
}

// The bounds of a configuration.
const (
	MaxRate        = 10e6
	MaxInFlight    = 1 << 20
	MaxConnections = 1 << 12
	MaxKeys        = 1 << 30
	MaxPayload     = 16 << 20
	MaxDuration    = 7 * 24 * time.Hour
	MaxTimeout     = time.Hour
	MaxClients     = 50_000 // two goroutines and a descriptor each
)

// Calls and pushes that a Push-Manager takes from one connection and one PushStream
// with its defaults: more would wait where nobody sees them.
const (
	callsPerConnection = 256
	pushesPerStream    = 1024
)

// WithDefaults is the configuration with its zero fields filled.
func (c Config) WithDefaults() Config {
	c.Connections = max(c.Connections, 0)
	if c.Connections == 0 {
		c.Connections = 2 // one leaves a core of a client of two idle
	}
	c.Connections = max(c.Connections, len(c.Addresses))
	if c.InFlight == 0 {
		c.InFlight = callsPerConnection * c.Connections
		if c.Way == Stream {
			c.InFlight = pushesPerStream * c.Connections
		}
	}
	setDefault(&c.Duration, 30*time.Second)
	setDefault(&c.Timeout, 5*time.Second)
	setDefault(&c.Users, 1000)
	setDefault(&c.UsersPerPush, 10)
	setDefault(&c.Rooms, 100)
	setDefault(&c.UserPattern, "u%d")
	setDefault(&c.RoomPattern, "r%d")
	c.IDs = c.IDs || c.Repeat > 0
	if c.nap == nil {
		c.nap = nap
	}
	return c
}

func setDefault[T comparable](v *T, d T) {
	var zero T
	if *v == zero {
		*v = d
	}
}

// Validate reports everything that is wrong with the configuration.
func (c Config) Validate() error {
	c = c.WithDefaults()
	var errs []error
	within := func(name string, v, low, high float64) {
		if !(v >= low && v <= high) { // NaN is not
			errs = append(errs, fmt.Errorf("load: %s is %v, want %v to %v", name, v, low, high))
		}
	}
	span := func(name string, v, low, high time.Duration) {
		if v < low || v > high {
			errs = append(errs, fmt.Errorf("load: %s is %v, want %v to %v", name, v, low, high))
		}
	}
	if len(c.Addresses) == 0 {
		errs = append(errs, errors.New("load: Addresses is empty"))
	}
	within("Connections", float64(c.Connections), 1, MaxConnections)
	within("Rate", c.Rate, 0, MaxRate)
	within("InFlight", float64(c.InFlight), 1, MaxInFlight)
	span("Duration", c.Duration, time.Millisecond, MaxDuration)
	span("Warmup", c.Warmup, 0, MaxDuration)
	span("Timeout", c.Timeout, time.Millisecond, MaxTimeout)
	within("Users", float64(c.Users), 1, MaxKeys)
	within("UsersPerPush", float64(c.UsersPerPush), 1, MaxKeys)
	within("Rooms", float64(c.Rooms), 1, MaxKeys)
	within("Repeat", c.Repeat, 0, 1)
	within("Clients", float64(c.Clients), 0, float64(min(c.Users, MaxClients)))
	if c.Clients > 0 && len(c.ClientURLs) == 0 {
		errs = append(errs, errors.New("load: ClientURLs is empty"))
	}
	within("len(Payload)", float64(len(c.Payload)), 0, MaxPayload)
	sum := 0.0
	for k, weight := range c.Mix {
		within("Mix of "+Kind(k).String(), weight, 0, math.MaxInt32)
		sum += weight
	}
	if sum == 0 {
		errs = append(errs, errors.New("load: Mix is empty"))
	}
	for _, p := range []struct{ name, text string }{{"UserPattern", c.UserPattern}, {"RoomPattern", c.RoomPattern}} {
		if _, err := parsePattern(p.text); err != nil {
			errs = append(errs, fmt.Errorf("load: %s: %w", p.name, err))
		}
	}
	return errors.Join(errs...)
}
